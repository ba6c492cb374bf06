"""The truth: SQLAlchemy Core over SQLite, with one writer that commits in groups and one reader.

store -> task_units, session_units (what changes) -> writer.py -> one transaction
      -> queries (what reads)                     -> reader.py -> one transaction
statements and tables define the SQL once; schema creates it and leads it forward; sqlite opens and locks the file.
"""

from .store import SqlStore as SqlStore
from .store import open_store as open_store
