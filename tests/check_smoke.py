"""Check the two JSON results of the smoke run: the first built all, the second nothing."""

import json
import sys
from pathlib import Path


def main() -> None:
    """Compare the files named on the command line, or end with what is wrong."""
    first, second = (json.loads(Path(name).read_text().splitlines()[-1]) for name in sys.argv[1:])
    built = [stage["stage"] for stage in first["stages"]]
    assert len(built) == 10 and len(set(built)) == 7, built
    assert all(stage["status"] == "built" for stage in first["stages"]), first["stages"]
    assert all(stage["status"] == "cached" for stage in second["stages"]), second["stages"]
    digests = [[stage["digest"] for stage in result["stages"]] for result in (first, second)]
    assert digests[0] == digests[1], digests
    assert first["metrics"] and first["metrics"] == second["metrics"], first["metrics"]
    assert first["mlflow_run_id"], first
    print(f"built in {first['seconds']} s, then found in {second['seconds']} s")


if __name__ == "__main__":
    main()
