"""From files to batches: `load`, a split, encodings, `Examples`, `Collator`.

parts = load_splits("esol.csv", ByColumn("scaffold_split"))
encoding = ByteSequences("smiles", max_length=512)
labels = Targets.fit(parts["train"], "label")
train = Examples(parts["train"], encoding, labels)
train.check()
loader = DataLoader(train, batch_size=32, shuffle=True, collate_fn=Collator())
"""

import os

from sma_fast.training.extras import require

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
require("datasets", "PIL")

from sma_fast.training.data.errors import DataError  # noqa: E402
from sma_fast.training.data.examples import Collator, Examples, pad_batch  # noqa: E402
from sma_fast.training.data.labels import ClassLabels, MultiLabels, Targets  # noqa: E402
from sma_fast.training.data.load import FORMATS, load  # noqa: E402
from sma_fast.training.data.pictures import Pictures  # noqa: E402
from sma_fast.training.data.sequences import ByteSequences  # noqa: E402
from sma_fast.training.data.split import ByColumn, ByIndex, load_splits  # noqa: E402
from sma_fast.training.data.state import from_state  # noqa: E402
from sma_fast.training.data.tables import TableColumns  # noqa: E402

__all__ = [
    "FORMATS",
    "ByColumn",
    "ByIndex",
    "ByteSequences",
    "ClassLabels",
    "Collator",
    "DataError",
    "Examples",
    "MultiLabels",
    "Pictures",
    "TableColumns",
    "Targets",
    "from_state",
    "load",
    "load_splits",
    "pad_batch",
]
