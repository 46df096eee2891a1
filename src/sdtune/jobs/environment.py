"""The environment that every training process gets, wherever it runs."""

# A library's own bars and hints would drown the run's progress. UTF-8 whatever the terminal's locale says.
ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONUTF8": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
