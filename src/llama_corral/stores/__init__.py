"""The truth: SQLAlchemy Core over SQLite or PostgreSQL, with one writer that commits in groups and one reader.

store -> *_units (what changes) -> writer.py, commits.py -> one transaction
      -> queries (what reads)   -> reader.py             -> one transaction
statements and tables define the SQL once; schema creates it and leads it forward; seals says what of a stored state is
sealed. urls chooses the database: sqlite opens and locks a file; postgres keeps connections to a server and says why what
several control planes do at once comes out right, postgres_schema readies its tables, postgres_server reaches it.
"""

from .store import SqlStore as SqlStore
from .store import open_store as open_store
