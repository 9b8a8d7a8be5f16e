#!/bin/bash
# Builds one of the images of this folder; works from any directory. Needs no root with Apptainer.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: build.sh IMAGE [OUTPUT] [--force] [--sandbox] [--pip FOLDER] [--set NAME=VALUE]...

IMAGE      tritonserver       Triton on GPUs, from NVIDIA's image        -> tritonserver-pyt.sif
           tritonserver-cpu   Triton on the CPU, from Debian and PyPI     -> tritonserver-cpu.sif
           train              Conch with DeepSpeed, from NVIDIA's CUDA    -> train.sif
           service            Conch's training service, from Debian       -> service.sif
OUTPUT     another file or, with --sandbox, folder
--force    replace OUTPUT
--sandbox  a folder instead of a file: starts where FUSE is not allowed, and can be changed
--pip      folder with a pip.conf (mirror, certificate, wheels) that decides alone where Python packages come from;
           it is seen at /mnt during the build, so paths in pip.conf start with /mnt
--set      a value for one of the definition's %arguments, e.g. IMAGE=nvcr.io/nvidia/tritonserver:26.11-py3
TEXT
}

fail() {
    echo "error: $1" >&2
    exit 1
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
image="" output="" options=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --force | --sandbox) options+=("$1") ;;
        --pip)
            [ -f "${2:-}/pip.conf" ] || fail "--pip needs a folder that holds pip.conf; '${2:-}' does not"
            options+=(--bind "$(realpath "$2"):/mnt") && shift
            ;;
        --set)
            [[ ${2:-} == *=* ]] || fail "--set needs NAME=VALUE, not '${2:-}'"
            options+=(--build-arg "$2") && shift
            ;;
        -*) fail "unknown option $1; build.sh --help lists them" ;;
        *) if [ -z "$image" ]; then image=$1; elif [ -z "$output" ]; then output=$1; else fail "too many names: $1"; fi ;;
    esac
    shift
done

case $image in
    tritonserver) output=${output:-tritonserver-pyt.sif} ;;
    tritonserver-cpu | train | service) output=${output:-$image.sif} ;;
    "") usage >&2 && exit 1 ;;
    *) fail "there is no image '$image'; choose tritonserver, tritonserver-cpu, train or service" ;;
esac
tool=$(command -v apptainer || command -v singularity) ||
    fail "neither apptainer nor singularity is installed (Debian sid, Fedora, EPEL: package apptainer)"
if [[ $image =~ ^(tritonserver-cpu|service)$ ]] && ! command -v debootstrap >/dev/null; then
    PATH=$PATH:/usr/sbin command -v debootstrap >/dev/null ||
        fail "debootstrap is not installed; $image starts from Debian packages (package debootstrap)"
fi
output=$(realpath --canonicalize-missing "$output")
[[ ! -e $output || " ${options[*]} " == *" --force "* ]] || fail "$output exists; give --force to replace it"
[ -d "$(dirname "$output")" ] || fail "folder $(dirname "$output") does not exist"

cd "$root" # %files of the definitions start here
PATH=$PATH:/usr/sbin:/sbin exec "$tool" build "${options[@]}" "$output" "singularity/$image.def"
