from sdtune import api as api
from sdtune import errors as errors
from sdtune import jobs as jobs
from sdtune.api import build as build
from sdtune.api import find_search as find_search
from sdtune.api import hpo as hpo
from sdtune.api import images as images
from sdtune.api import sync_nfs as sync_nfs
from sdtune.api import train as train

__version__: str
