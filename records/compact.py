# Assigned, since --help shows it and python -OO drops docstrings
__doc__ = """
compact.py: logs name the file that holds their source, instead of holding it.

    python records/compact.py FOLDER...    # the logs at and below each folder; the files lie in the folder

A source becomes FOLDER/train_gpt-HASH.py, and in its logs one line, "source: PATH sha256:HASH", with the path
from the log's folder. race.py does this with each log. Logs that name their source stay as they are.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path

from report import RULE, SOURCE, ReportError, find_logs

def compact(log: Path, folder: Path) -> None:
    """Put the source of a log into a file in this folder, and its name into the log. Raises OSError."""
    source, rule, rest = log.read_bytes().partition(RULE.encode())
    if not rule or SOURCE.fullmatch(source.decode(errors="replace")):
        return
    digest = hashlib.sha256(source).hexdigest()
    file = folder / f"train_gpt-{digest[:8]}.py"
    if not file.exists() or file.read_bytes() != source:
        file.write_bytes(source)
    line = f"source: {Path(os.path.relpath(file, log.parent)).as_posix()} sha256:{digest}"
    new = log.with_name(f"{log.name}.new")  # the log is whole at any time
    new.write_bytes(line.encode() + rule + rest)
    new.replace(log)

def main(argv=None) -> int:
    """Returns the exit code: 0, or 1 after one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", type=Path)
    try:
        for folder in parser.parse_args(argv).folders:
            for log in [log for logs in find_logs(folder) for log in logs]:
                compact(log, folder)
    except (ReportError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0

if __name__ == "__main__":
    sys.exit(main())
