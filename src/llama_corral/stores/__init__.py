"""The truth: SQLAlchemy Core over SQLite, with one writer that commits in groups and one reader.

store -> *_units (what changes) ->  writer.py -> one transaction
      -> queries (what reads)   -> reader.py -> one transaction
statements and tables define the SQL once; schema creates it and leads it forward; seals says what of a stored state is
sealed; sqlite opens and locks the file.
"""

from .store import SqlStore as SqlStore
from .store import open_store as open_store
