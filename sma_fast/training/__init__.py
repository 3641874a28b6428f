"""Data sets in, transformers.Trainer around, results out."""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
