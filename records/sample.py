# Assigned, since --help shows it and python -OO drops docstrings
__doc__ = """
Print text that the model of a checkpoint writes.

    python records/sample.py logs/RUN/step_000044.safetensors --prompt "def main(" --length 200

The vocabulary is bytes (VOCAB_SIZE=257), or GPT-2's, which needs tiktoken and, once, a network to fetch it.
It runs on one thread of the CPU, unless OMP_NUM_THREADS says how many, with the settings that the checkpoint
holds, and draws at a temperature of 0.8.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt
from train_gpt import NETWORKS, Kernels, Network, Stage, UserError, torch


def load_model(path: Path) -> tuple[Network, Stage]:
    """The model of a checkpoint and its stage. Raises UserError if the file cannot give them."""
    tensors, metadata = train_gpt.read_safetensors(path)
    about = json.loads(metadata["run"])
    try:
        s = train_gpt.restore_settings(about)
        model = NETWORKS[s.network](s, Kernels())
        for name, p in model.named_parameters():
            p.data.copy_(tensors[name])
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path}: expected a checkpoint of this train_gpt.py, found {error!r}; take the "
                        "version that wrote it: the log beside it holds the source.") from None
    schedule = train_gpt.make_schedule(s)
    for stage in train_gpt.stages_between(schedule, None, schedule[int(metadata["step"])].stage):
        model.enter_stage(stage)
    return model, stage


def get_tokenizer(vocab_size: int):
    """(text -> ids, ids -> text). Raises UserError for a vocabulary that is neither bytes nor GPT-2's."""
    if vocab_size == 257:
        return (lambda text: list(text.encode(errors="surrogateescape")),  # bytes of an argument as they were
                lambda ids: bytes(ids).decode(errors="replace"))
    try:
        if vocab_size != 50_257:
            raise ValueError(f"VOCAB_SIZE={vocab_size}")
        import tiktoken

        gpt2 = tiktoken.get_encoding("gpt2")
        return gpt2.encode_ordinary, gpt2.decode
    except Exception as error:  # no package, or no network for its vocabulary
        raise UserError("expected a vocabulary of bytes (257 ids), or GPT-2's (50,257 ids) and tiktoken, "
                        f"found {error!r}; python -m pip install tiktoken, and use it once with a network."
                        ) from None


@train_gpt.best_effort_console()
def main() -> int:
    """Returns the exit code: 0, 1 after one sentence on stderr, 130 if Ctrl-C ended the text."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", default="", help="how the text begins")
    parser.add_argument("--length", type=int, default=300, help="most tokens to draw (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    sys.stdout.reconfigure(errors="replace")  # a console need not have all characters
    args = parser.parse_args()
    if "OMP_NUM_THREADS" not in os.environ:  # each token is little work
        torch.set_num_threads(1)
    try:
        model, stage = load_model(args.checkpoint)
        encode, decode = get_tokenizer(model.settings.vocab_size)
        ids = encode(args.prompt)
        try:
            for token in train_gpt.generate(model, stage, ids, args.length, args.seed):
                ids.append(token)
        finally:
            print(decode(ids))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
