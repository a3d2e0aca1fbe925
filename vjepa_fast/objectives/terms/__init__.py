"""One file per objective term; every module here is found and imported by ``OBJECTIVES``."""
