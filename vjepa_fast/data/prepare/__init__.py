"""From what a data set's download unpacks to, to manifests and fast copies.

One module per data set is in ``sets``; `api` says what a data set is, `run` does the work.
"""

from vjepa_fast.data.prepare.api import DATA_SETS, DataSet, Listed, Listing, Request
from vjepa_fast.data.prepare.copy import CopyForm
from vjepa_fast.data.prepare.run import Report, prepare

__all__ = ["DATA_SETS", "CopyForm", "DataSet", "Listed", "Listing", "Report", "Request", "prepare"]
