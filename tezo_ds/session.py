"""Sessions for scripts: a model with engine and data, as `tezo-ds train` opens them."""

from tezo_ds.settings import Settings
from tezo_ds.training.session import Session, open_session

__all__ = ["Session", "Settings", "open_session"]
