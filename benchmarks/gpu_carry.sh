#!/usr/bin/env bash
# Collect in .whl/ the wheels that benchmarks/gpu.py needs on a machine without a network which has Python 3.12, torch,
# accelerate and peft of its own, about 25 MB. Run it in the repository's root, on a machine that has a network.
# The versions are those of requirements.txt; git ignores the folder.
set -euo pipefail
mkdir -p .whl
exclude=$(git rev-parse --git-path info/exclude)
grep -qx /.whl/ "$exclude" 2>/dev/null || echo /.whl/ >>"$exclude"

platforms=()
for glibc in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
get() {
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" -d .whl "$@"
}
pin() { grep -oE "^$1==[0-9.]+" requirements.txt | head -1; }
needs() { unzip -p .whl/"$1"-[0-9]*.whl '*/METADATA' | sed -nE "s/^Requires-Dist: ($2[^;]*).*/\1/p" | head -1 | tr -d ' ()'; }

get "$(pin datasets)" "$(pin transformers)" trl==1.16.0 hjson einops annotated-types typing-extensions typing-inspection pydantic
get "$(needs transformers tokenizers)" "$(needs datasets dill)" "$(needs datasets multiprocess)" "$(needs pydantic pydantic-core)"
if ! ls .whl/deepspeed-*.whl >/dev/null 2>&1; then  # comes as source alone; its kernels are not needed
  python3 -m pip download -q --no-deps --no-binary=:all: -d .whl "$(pin deepspeed)"
  DS_BUILD_OPS=0 python3 -m pip wheel -q --no-deps -w .whl .whl/deepspeed-*.tar.gz
  rm .whl/deepspeed-*.tar.gz
fi
ls .whl
du -sh .whl
