#!/bin/sh
# Install llm's own dependencies alone, as on a bare GPU node, and run tests/llm there:
# llm must need no prefect, mlflow, datasets or pydantic.
set -eu
python=${1:-python3}
cd "$(dirname "$0")/.."
venv=${BARE_VENV:-.venv-llm}
stamp="$venv/installed"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
    "$python" -m venv "$venv"
    "$python" - > "$venv/requirements.txt" <<'PYTHON'
import tomllib
with open("pyproject.toml", "rb") as file:
    print("\n".join(tomllib.load(file)["dependency-groups"]["llm"]))
PYTHON
    "$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt \
        -r "$venv/requirements.txt" pytest pytest-timeout pytest-rerunfailures hypothesis
    touch "$stamp"
fi
for forbidden in prefect mlflow datasets pydantic; do
    if "$venv/bin/python" -c "import $forbidden" 2> /dev/null; then
        echo "$forbidden is installed in $venv; the check means nothing" >&2
        exit 1
    fi
done
PYTHONPATH=. "$venv/bin/python" -m pytest tests/llm -m "not slow and not distributed"
