"""The model that ships with the worker, so that a fresh install can serve without a download.

It is a small OPT checkpoint with a byte-level BPE tokenizer, trained by `train.py` in this
folder on the Python standard library. It continues Python code plausibly and nothing more;
its purpose is demonstrations, tests and benchmarks with real text.
"""

from importlib.resources import files
from pathlib import Path


def embedded_model_path() -> Path:
    """Return the folder that `from_pretrained` of a model or a tokenizer accepts.

    Raises FileNotFoundError where the package has no real folder on disk (imported from a zip
    archive) or was built without the checkpoint: the loaders memory-map the weights, so there
    is nothing useful to hand them.
    """
    folder = Path(str(files(__name__))) / "model"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"no embedded checkpoint at {folder}")
    return folder
