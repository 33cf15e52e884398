"""
Print text that the model of a checkpoint writes.

    python data/sample.py logs/RUN/step_000044.safetensors --prompt "def main(" --length 200

The vocabulary is bytes (VOCAB_SIZE=257), or GPT-2's, which needs tiktoken and, once, a network to fetch it.
It runs on the CPU, with the settings that the checkpoint holds, and draws at a temperature of 0.8.
"""

import argparse
import json
import random
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt
from train_gpt import GPT, Kernels, Settings, UserError


def load_model(path: Path) -> tuple[GPT, tuple[int, int]]:
    """The model of a checkpoint and its attention windows. Raises UserError if the file cannot give them."""
    tensors, metadata = train_gpt.read_safetensors(path)
    about = json.loads(metadata["run"])
    try:
        s = Settings(**{f.name: about[f.name] for f in fields(Settings) if f.name in about})
        model = GPT(s, Kernels())
        for name, p in model.named_parameters():
            p.data.copy_(tensors[name])
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path}: expected a checkpoint of this train_gpt.py, found {error!r}; take the "
                        "version that wrote it: the log beside it holds the source.") from None
    return model, train_gpt.attention_windows(int(metadata["step"]), s)


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


def write_on(model: GPT, windows: tuple[int, int], ids: list[int], length: int, seed: int) -> None:
    """Append to `ids` up to `length` tokens that the model draws, one by one: a stop leaves those so far."""
    seeds = random.Random(seed)
    for _ in range(length):
        token = train_gpt.generate(model, windows, ids, 1, seeds.getrandbits(63))[len(ids):]
        if not token:  # the document ends
            break
        ids += token


def main() -> int:
    """Returns the exit code: 0, 1 after one sentence on stderr, 130 if Ctrl-C ended the text."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", default="", help="how the text begins")
    parser.add_argument("--length", type=int, default=300, help="most tokens to draw (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    sys.stdout.reconfigure(errors="replace")  # a console need not have all characters
    args = parser.parse_args()
    try:
        model, windows = load_model(args.checkpoint)
        encode, decode = get_tokenizer(model.settings.vocab_size)
        ids = encode(args.prompt)
        try:
            write_on(model, windows, ids, args.length, args.seed)
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
