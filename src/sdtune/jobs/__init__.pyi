from sdtune.api.jobs import cancel as cancel
from sdtune.api.jobs import list as list
from sdtune.api.jobs import logs as logs
from sdtune.api.jobs import open as open
from sdtune.api.jobs import show as show
