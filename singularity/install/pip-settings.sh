# shellcheck shell=sh
# Sourced by the other scripts. A folder mounted at /mnt while the image is built (build.sh --pip FOLDER) may hold a
# pip.conf: a mirror, a company's certificate, wheels. It then decides alone where packages come from.
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
if [ -e /mnt/pip.conf ]; then
    export PIP_CONFIG_FILE=/mnt/pip.conf
elif [ -n "${TORCH_INDEX:-}" ]; then
    export PIP_EXTRA_INDEX_URL="$TORCH_INDEX"
fi
