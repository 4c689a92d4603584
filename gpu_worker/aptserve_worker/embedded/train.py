"""Train the embedded model: a small OPT that continues Python code.

A serving system is best shown and tested with a real checkpoint. This one is learnt from text
that every machine with Python has, the standard library's sources: nothing is downloaded, and
two processor cores need less than an hour.

The tokenizer is a byte-level BPE without prefix space or normalising: any Unicode text survives
encode and decode. Training documents are `<s> file text </s>`; the tokenizer puts `<s>` before
every prompt and never adds `</s>`, which the model writes itself to end a file. Special tokens
are not looked for inside a text (`split_special_tokens`), so a literal "</s>" in a prompt is
ordinary characters; users of the bare `tokenizers` library set `encode_special_tokens = True`.

The learning rate warms up, stays constant, then falls linearly to zero. A batch depends on the
seed and the step alone, so a run that was resumed, or cut to fewer steps before its rate began
to fall, sees exactly what an uninterrupted run of the final length would have seen.

    python train.py --out model --steps 5000 --checkpoint run.pt
    python train.py --out model --steps 3000 --resume run.pt    # finish an unfinished run earlier

With glibc, training is about a quarter faster when the process keeps freed memory:
MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000
"""

import hashlib
import json
import math
import os
import platform
import random
import re
import sysconfig
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass
from importlib.util import decode_source
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import OPTConfig, OPTForCausalLM

STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
# Tests, tables and generated files: text that teaches little or differs between machines.
EXCLUDED_FOLDERS = "site-packages|dist-packages|tests?|idle_test|encodings|pydoc_data"
EXCLUDED = re.compile(rf"(^|/)(({EXCLUDED_FOLDERS})/|config-|_sysconfigdata)")

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
PAD_ID, BOS_ID, EOS_ID = range(3)
VOCAB_SIZE = 3072
CONTEXT = 1024
IdArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, together with the sources and the library versions."""

    seed: int
    steps: int
    decay_steps: int
    warmup_steps: int = 100
    peak_learning_rate: float = 5e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    blocks_per_step: int = 2  # of CONTEXT tokens
    # A step's text is cut into rows of one length, taken in turn. Short rows cost less attention
    # per token and may start at any position, so that every learned position is trained; the
    # long row teaches the model to use the whole context.
    row_lengths: tuple[int, ...] = (256, 512, 256, 256, 1024, 256, 512, 256)


@dataclass(frozen=True)
class Data:
    """Files behind each other as rows of token ids: `<s> text </s> <s> text </s> ...`."""

    tokenizer: Tokenizer
    train_ids: IdArray
    valid_ids: IdArray
    summary: dict[str, Any]


@dataclass
class Run:
    """A training run between two steps: all that a checkpoint has to keep."""

    model: OPTForCausalLM
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    wall_seconds: float = 0.0
    average_loss: float = math.log(VOCAB_SIZE)  # moving, over about 100 steps


def split_files(root: Path, seed: int) -> tuple[list[Path], list[Path]]:
    """Split the usable .py files under `root` into (training, validation).

    The held-out files follow from a hash of their names, not from the seed: losses of runs with
    different seeds stay comparable.
    """
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    names = [name for name in names if not EXCLUDED.search(name)]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    num_valid = max(1, round(len(names) * 0.03))
    files = [root / name for name in names]
    valid, train = files[:num_valid], files[num_valid:]
    random.Random(seed).shuffle(train)
    return train, valid


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Learn the merges. All 256 bytes are in the alphabet, so no text has unknown parts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.encode_special_tokens = True
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    return tokenizer


def load_data(root: Path, seed: int) -> Data:
    """Read the files in their declared encodings, learn the tokenizer, turn text into ids."""
    summary: dict[str, Any] = {"data": f"{root.name}/**/*.py"}
    if root == STANDARD_LIBRARY:
        summary["data"] = "Python standard library (PSF licence), without tests and tables"
    sides = split_files(root, seed)
    texts = [[decode_source(path.read_bytes()) for path in side] for side in sides]
    tokenizer = train_tokenizer(texts[0])
    streams = []
    for name, side in zip(("train", "valid"), texts, strict=True):
        encodings = tokenizer.encode_batch(side)
        ids = (token for encoding in encodings for token in (*encoding.ids, EOS_ID))
        streams.append(np.fromiter(ids, dtype=np.int64))
        summary[f"num_{name}_files"] = len(side)
        summary[f"num_{name}_bytes"] = sum(len(text.encode()) for text in side)
        summary[f"num_{name}_tokens"] = len(streams[-1])
    if len(streams[0]) < 2 * CONTEXT:
        raise SystemExit(f"--sources: {root} has too little text to train on: {summary}")
    return Data(tokenizer, streams[0], streams[1], summary)


def training_batch(ids: IdArray, step: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the step's share of the stream as (targets, positions), both [rows, row length].

    Each pass over the stream takes every block once, in a fresh order and cut at a fresh phase:

        | phase | block 0 | block 1 | ... | block n-1 | rest |
    """
    num_blocks = len(ids) // CONTEXT - 1
    blocks = []
    for turn in range(step * recipe.blocks_per_step, (step + 1) * recipe.blocks_per_step):
        rng = np.random.default_rng((recipe.seed, turn // num_blocks))
        phase = rng.integers(CONTEXT)
        start = phase + rng.permutation(num_blocks)[turn % num_blocks] * CONTEXT
        blocks.append(ids[start : start + CONTEXT])
    row_length = recipe.row_lengths[step % len(recipe.row_lengths)]
    targets = np.stack(blocks).reshape(-1, row_length)
    rng = np.random.default_rng((recipe.seed, step, row_length))
    offsets = rng.integers(CONTEXT - row_length + 1, size=len(targets))
    offsets *= rng.integers(2, size=len(targets))  # half of the rows start where prompts start
    positions = offsets[:, None] + np.arange(row_length)
    return torch.from_numpy(targets), torch.from_numpy(positions)


def new_run(recipe: Recipe, vocab_size: int) -> Run:
    torch.manual_seed(recipe.seed)
    config = OPTConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        word_embed_proj_dim=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        ffn_dim=1024,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = OPTForCausalLM(config)
    model.set_attn_implementation("eager")  # trains faster than SDPA on a CPU; no file keeps it
    return Run(model, new_optimizers(model, recipe))


def new_optimizers(model: OPTForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, biases and norms.

    In one trial of 150 steps each the last 50 averaged 5.33 nats this way at a rate of 4e-3, and
    6.05 with AdamW alone at 2e-3; AdamW's rate was hardly tuned, so this is no fair comparison of
    the two. One rate serves both because Muon's updates are scaled to the size of AdamW's.
    """
    matrices = [weight for weight in model.model.decoder.layers.parameters() if weight.dim() == 2]
    chosen = set(matrices)
    others = [weight for weight in model.parameters() if weight not in chosen]
    decay = recipe.weight_decay
    return [
        torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=0.0, betas=recipe.betas, fused=True),
    ]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Warm-up, constant, linear decay; only the decay depends on the number of steps."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    decay = min(1.0, (recipe.steps - step) / recipe.decay_steps)
    return recipe.peak_learning_rate * warmup * decay


def token_losses(model: OPTForCausalLM, targets: Tensor, positions: Tensor) -> Tensor:
    """Return the cross entropy of every target in nats, flat; 0 where the target is padding."""
    inputs = targets.roll(1, dims=1)
    inputs[:, 0] = BOS_ID  # any text may follow `<s>`, as any prompt may in service
    logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=PAD_ID, reduction="none"
    )


def train_step(run: Run, ids: IdArray, recipe: Recipe) -> None:
    started = time.monotonic()
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.step, recipe)
    # With bfloat16 instructions a step took 0.7 of the time that float32 takes.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = token_losses(run.model, *training_batch(ids, run.step, recipe)).mean()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip_norm)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    run.average_loss += 0.01 * (loss.item() - run.average_loss)
    run.step += 1
    run.wall_seconds += time.monotonic() - started


@torch.no_grad()
def validation_loss(model: OPTForCausalLM, ids: IdArray) -> float:
    """Return the mean loss per held-out token in nats, in full windows of CONTEXT tokens."""
    padded = np.pad(ids, (0, -len(ids) % CONTEXT), constant_values=PAD_ID)
    positions = torch.arange(CONTEXT)[None]
    rows = torch.from_numpy(padded.reshape(-1, 1, CONTEXT))
    return sum(token_losses(model, row, positions).sum().item() for row in rows) / len(ids)


def save_checkpoint(path: Path, run: Run, tokenizer: Tokenizer) -> None:
    state = {
        "model": run.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "progress": (run.step, run.wall_seconds, run.average_loss),
        "tokenizer": tokenizer.to_str(),
    }
    fresh = path.with_name(f"{path.name}.part")
    torch.save(state, fresh)
    fresh.replace(path)


def load_checkpoint(path: Path, run: Run, tokenizer: Tokenizer) -> None:
    state = torch.load(path, weights_only=True)
    if state["tokenizer"] != tokenizer.to_str():
        raise SystemExit(f"--resume: {path} was trained on other sources or with another seed")
    run.model.load_state_dict(state["model"])
    for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    run.step, run.wall_seconds, run.average_loss = state["progress"]


def finish(out: Path, run: Run, recipe: Recipe, data: Data) -> None:
    """Round the weights to float16, measure them as they will be read, write the folder."""
    model = run.model.half().float()  # type: ignore[no-untyped-call]
    valid_loss = validation_loss(model, data.valid_ids)
    bits_per_token = valid_loss / math.log(2)
    bytes_per_token = data.summary["num_valid_bytes"] / len(data.valid_ids)
    record = {
        **data.summary,
        "recipe": asdict(recipe),
        "num_steps_done": run.step,
        "num_tokens_seen": run.step * recipe.blocks_per_step * CONTEXT,
        "num_parameters": model.num_parameters(),
        "train_loss_nats_per_token": run.average_loss,
        "valid_loss_nats_per_token": valid_loss,
        "valid_bits_per_byte": bits_per_token / bytes_per_token,
        "wall_seconds": run.wall_seconds,
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
    }
    export(out, model, data.tokenizer, record)
    print(json.dumps(record, indent=2))


def export(out: Path, model: OPTForCausalLM, tokenizer: Tokenizer, record: dict[str, Any]) -> None:
    """Write the folder that `from_pretrained` loads; a reader never meets half of a file."""
    staging = out / f".export.{os.getpid()}"
    model.half().save_pretrained(staging)  # type: ignore[no-untyped-call]
    tokenizer.save(str(staging / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **SPECIAL_TOKENS,
        "model_max_length": CONTEXT,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    ids = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    contents = {"tokenizer_config": settings, "generation_config": ids, "TRAINING": record}
    for name, value in contents.items():
        (staging / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    for path in staging.iterdir():
        path.chmod(0o644)
        path.replace(out / path.name)
    staging.rmdir()


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the finished checkpoint")
    add("--steps", type=int, default=5000, help="length of the run; 2048 tokens a step")
    add("--decay-steps", type=int, help="steps of falling learning rate (default: 40%% of all)")
    add("--seed", type=int, default=0, help="of weights, file order and batches")
    add("--sources", type=Path, default=STANDARD_LIBRARY, help="folder of .py files to learn from")
    add("--checkpoint", type=Path, help="file to save the run in every 50 steps, for --resume")
    add("--resume", type=Path, help="continue from this checkpoint; --steps may be changed")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    decay_steps = args.decay_steps or max(1, round(args.steps * 0.4))
    recipe = Recipe(seed=args.seed, steps=args.steps, decay_steps=decay_steps)
    data = load_data(args.sources, args.seed)
    run = new_run(recipe, data.tokenizer.get_vocab_size())
    if args.resume:
        load_checkpoint(args.resume, run, data.tokenizer)
    while run.step < recipe.steps:
        train_step(run, data.train_ids, recipe)
        if run.step % 50 == 0:
            pace = run.wall_seconds / run.step
            print(f"step {run.step}: loss {run.average_loss:.3f}, {pace:.2f} s/step", flush=True)
            if args.checkpoint:
                save_checkpoint(args.checkpoint, run, data.tokenizer)
    finish(args.out, run, recipe, data)


if __name__ == "__main__":
    main()
