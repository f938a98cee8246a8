#!/bin/sh
# One call of gpu_reproduction.py on a machine that has PyTorch but not all that nrcg needs. Wheels for the rest, if
# there are any, lie in the folder wheels/ (or $WHEELS); they are unpacked beside the work, nothing is installed.
#   sh benchmarks/gpu_reproduction.sh --minutes 9 --out "$OUT"
#   sh benchmarks/gpu_reproduction.sh --minutes 9 --state state --out "$OUT"
set -eu
cd "$(dirname "$0")/.."
site=${SITE:-/tmp/nrcg-site}
for wheel in "${WHEELS:-wheels}"/*.whl; do
    [ -e "$wheel" ] || continue
    python3 -m zipfile -e "$wheel" "$site"
done
# What is in wheels/ goes before what the machine has.
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" NRCG_TRACKING=off
missing=$(python3 -c "
from importlib.util import find_spec
needed = 'torch torchvision numpy scipy PIL yaml matplotlib jinja2 tqdm safetensors accelerate diffusers pydantic cleanfid'
print(' '.join(name for name in needed.split() if find_spec(name) is None))")
[ -z "$missing" ] || { echo "missing: $missing; put their wheels into wheels/ (docs/gpu_reproduction.md)" >&2; exit 1; }
exec python3 benchmarks/gpu_reproduction.py "$@"
