"""`python -m tests.models NAME ...`: make missing models; folders on stdout, all else on stderr.

So a shell can write `MODEL=$(python -m tests.models smollm2)`.
"""

import argparse
import sys
from contextlib import redirect_stdout

from tests.models import RECIPES, MakeError, ensure


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.models", description="Make the demo and test models.")
    parser.add_argument("names", nargs="+", choices=sorted(RECIPES), metavar="NAME", help=" or ".join(sorted(RECIPES)))
    for name in parser.parse_args().names:
        try:
            with redirect_stdout(sys.stderr):
                path = ensure(name)
        except MakeError as error:
            sys.stderr.write(f"cannot make the model {name}: {error}\n")
            return 1
        sys.stdout.write(f"{path}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
