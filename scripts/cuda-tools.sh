#!/bin/sh
# candor-tools with training on a GPU (its feature `cuda`, which is candle's). `cuda-tools.sh build …` builds it: with the
# nvcc of $NVCC, $CUDA_HOME or PATH, else with one that is fetched by pip into .tools; the rest of the line goes to cargo.
# candle's kernels are made for one compute capability, $CUDA_COMPUTE_CAP, else that of this machine's GPU, else 8.0.
# `cuda-tools.sh check …` looks only whether the Rust code compiles: nvcc is a stand-in then that makes empty files, as
# nothing reads what it makes.
set -eu
cd "$(dirname "$0")/.."
command=$1
shift

case $command in
check)
    stand_in=$(mktemp -d)
    trap 'rm -rf "$stand_in"' EXIT
    mkdir "$stand_in/bin"
    cat >"$stand_in/bin/nvcc" <<'STAND_IN'
#!/bin/sh
# What is asked for: -o FILE, or --output-directory FOLDER for the PTX of the last file.
folder=""
while [ $# -gt 0 ]; do
    case $1 in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
    -o) : >"$2" ;;
    --output-directory) folder=$2 ;;
    esac
    last=$1
    shift
done
[ -z "$folder" ] || : >"$folder/$(basename "$last" .cu).ptx"
STAND_IN
    chmod +x "$stand_in/bin/nvcc"
    NVCC=$stand_in/bin/nvcc
    CUDA_HOME=$stand_in
    : "${CUDA_COMPUTE_CAP:=80}"
    # Kept apart, so that a build never takes empty kernels.
    CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/cuda-tools-check
    export CARGO_TARGET_DIR
    ;;
*)
    if [ -z "${NVCC-}" ] && [ -z "${CUDA_HOME-}" ] && ! command -v nvcc >/dev/null; then
        scripts/setup-cuda.sh tools
        CUDA_HOME=$PWD/.tools/nvcc130/nvidia/cu13
    fi
    if [ -z "${NVCC-}" ] && [ -n "${CUDA_HOME-}" ]; then
        NVCC=$CUDA_HOME/bin/nvcc
    fi
    [ -n "${CUDA_COMPUTE_CAP-}" ] || nvidia-smi >/dev/null 2>&1 || CUDA_COMPUTE_CAP=80
    ;;
esac
# What is set is handed on; candle's build looks for the rest.
for name in NVCC CUDA_HOME CUDA_COMPUTE_CAP; do
    eval "[ -z \"\${$name-}\" ] || export $name"
done
RUSTC_WRAPPER=$PWD/scripts/rustc-cudarc.sh cargo "$command" --locked -p candor-tools --features cuda "$@"
