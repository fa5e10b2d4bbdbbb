"""Data: a loader whose order is a pure function of (seed, epoch), and whose cursor is data."""

from lumen.data.loader import Cursor as Cursor
from lumen.data.loader import Loader as Loader
from lumen.data.order import permute as permute
from lumen.data.rank_data import per_rank as per_rank
