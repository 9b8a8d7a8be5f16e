#!/bin/bash
# Builds the CPU image as an ordinary user and shows that it serves: a small random reward model is converted with
# conch convert, served from the container, and scored by Conch's own client: with the command line of README.md, with
# serve.sh, and by `conch serve up --runtime apptainer`, which is also shown a killed server and a new version.
#
#     sudo singularity/prove_cpu_image.sh FOLDER [--pip FOLDER]
#
# FOLDER keeps what was made (5 GB), so that a second call is quick. Apptainer need not be installed: it runs from a
# Debian sid in FOLDER/sid, in a mount namespace of its own. Needs root (for that), debootstrap, and `make install`.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 1
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ "$(id -u)" = 0 ] || fail "run this as root: it makes a mount namespace; the build and the server run as user 1000"
[ -x "$python" ] || fail "$python does not exist; call make install first"
command -v debootstrap unshare >/dev/null || fail "needs debootstrap and util-linux's unshare"
[ -n "${1:-}" ] || fail "name a folder for what is made: prove_cpu_image.sh FOLDER [--pip FOLDER]"
mkdir -p "$1" && work=$(realpath "$1") && shift
build_options=()
if [ "${1:-}" = --pip ]; then
    [ -f "${2:-}/pip.conf" ] || fail "--pip needs a folder that holds pip.conf; '${2:-}' does not"
    rm -rf "$work/pip" && cp -rL "$2" "$work/pip" # where Debian sid sees it
    build_options=(--pip "$work/pip") && shift 2
fi
[ $# = 0 ] || fail "unexpected: $*"
user=1000 sid=$work/sid store=$work/model_store

say() { echo "== $1"; }

make_sid() {
    [ ! -e "$sid/.complete" ] || return 0
    say "Debian sid with Apptainer in $sid"
    rm -rf "$sid"
    # The libraries are what the Python of this checkout may want, which runs there too.
    debootstrap --variant=minbase \
        --include=ca-certificates,apptainer,debootstrap,squashfuse,uidmap,libexpat1,libffi8,libsqlite3-0,libssl3t64 \
        sid "$sid" http://deb.debian.org/debian >"$work/sid.log" 2>&1 || fail "debootstrap failed: $work/sid.log"
    chroot "$sid" useradd --create-home --uid "$user" conch
    touch "$sid/.complete"
}

# What in_sid has to show of the Python that .venv was made from: its folder or, of one below /usr, its parts.
python_parts() {
    "$python" - "$python" <<'PY'
import os
import sys
import sysconfig

if not sys.base_prefix.startswith("/usr"):
    print(sys.base_prefix)
else:
    link = sys.argv[1]
    while link.startswith(sys.prefix):
        link = os.path.join(os.path.dirname(link), os.readlink(link))
    library = os.path.join(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME"))
    parts = {link, os.path.realpath(link), sysconfig.get_path("stdlib", vars={"base": sys.base_prefix})}
    print(*sorted(parts | ({library} if os.path.exists(library) else set())), sep="\n")
PY
}

# Runs a command of Debian sid as an ordinary user. The checkout and the work folder have the paths that they have
# outside. pivot_root, because in a chroot the kernel lets nobody make the user namespace that Apptainer needs.
# Becomes the command, so call it in a subshell: in the background $! is then the command's own process.
in_sid() {
    # shellcheck disable=SC2016 # the inner shell expands them
    exec unshare --mount --propagation private bash -c '
        set -e
        sid=$1 root=$2 work=$3 user=$4 && shift 4
        mount --bind "$sid" "$sid"
        mkdir -p "$sid/old_root" "$sid$root" "$sid$work"
        mount -t proc proc "$sid/proc"
        mount --rbind /sys "$sid/sys"
        mount --rbind /dev "$sid/dev"
        [ -e "$work/fuse" ] || mknod -m 666 "$work/fuse" c 10 229 # some systems keep theirs for root
        mount --bind "$work/fuse" "$sid/dev/fuse"
        mount --bind "$root" "$sid$root"
        mount --bind "$work" "$sid$work"
        while read -r part; do
            above=$sid$(dirname "$part")
            mkdir -p "$above"
            if [ -d "$part" ]; then mkdir -p "$sid$part"; else touch "$sid$part"; fi
            mount --bind "$part" "$sid$part"
            while [ "$above" != "$sid" ]; do chmod a+x "$above" && above=$(dirname "$above"); done
        done <"$work/python"
        cat /etc/resolv.conf >"$sid/etc/resolv.conf"
        cat /etc/hosts >"$sid/etc/hosts"
        cd "$sid" && pivot_root . old_root && umount --lazy /old_root && cd "$work/home"
        exec setpriv --reuid "$user" --regid "$user" --init-groups env -i HOME="$work/home" \
            PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 "$@"
    ' -- "$sid" "$root" "$work" "$user" "$@"
}

convert_model() {
    say "a random reward model, converted into $store"
    rm -rf "$store" "$work/checkpoint"
    (cd "$root" && "$python" -c 'import sys; from pathlib import Path; from tests.tiny import reward_checkpoint
reward_checkpoint(Path(sys.argv[1]))' "$work/checkpoint" && "$python" -m conch.converters.to_triton \
        --checkpoint "$work/checkpoint" --name tiny --model-store "$store") >"$work/convert.log" 2>&1 ||
        fail "conversion failed: $work/convert.log"
    chown -R "$user" "$store" # the server runs as this user
}

# Starts the command given, waits until our client gets the golden scores, stops the server.
serve_and_score() {
    say "server: $*"
    in_sid "$@" >"$work/server.log" 2>&1 &
    local server=$!
    trap 'kill $server 2>/dev/null || true' EXIT
    score ||
        { tail -n 30 "$work/server.log" >&2 && fail "the container did not serve; the log is $work/server.log"; }
    kill -TERM "$server"
    wait "$server" || fail "the server left with $? after SIGTERM; the log is $work/server.log"
    trap - EXIT
}

# Another version of the same model, for `swap`.
convert_again() {
    (cd "$root" && "$python" -m conch.converters.to_triton --checkpoint "$work/checkpoint" --name tiny \
        --model-store "$store") >>"$work/convert.log" 2>&1 || fail "conversion failed: $work/convert.log"
    chown -R "$user" "$store"
}

# A subcommand of `conch serve`, in Debian sid, where it finds Apptainer.
serving() { (in_sid "$python" -m conch.serving "$@"); }

# Prints one field of the deployment's only server.
replica() { serving status proof --json --interval 0.1 | "$python" -c \
    'import json, sys; print(json.load(sys.stdin)["proof"][0][sys.argv[1]])' "$1"; }

score() {
    (cd "$root" && "$python" singularity/score_golden.py localhost:8001/tiny "$store" --wait 120)
}

# Waits until the server runs again, which is another process then.
wait_for_restart() {
    for _ in $(seq 240); do
        [ "$(replica restarts) $(replica phase)" != "1 ready" ] || return 0
        sleep 0.5
    done
    fail "the server was not started again: $work/home/.local/state/conch/serving/proof/supervisor.log"
}

supervise() {
    say "conch serve up --runtime apptainer --image $(basename "$image")"
    serving up --model-store "$store" --model tiny --name proof --detach --runtime apptainer --image "$image" ||
        fail "conch.serving up failed"
    trap 'serving down proof || true' EXIT
    score && serving status proof --interval 0.1
    say "kill -9 of its server"
    kill -KILL "$(replica pid)"
    wait_for_restart
    score && serving status proof --interval 0.1
    say "a new version"
    convert_again
    serving swap proof
    score
    say "down"
    serving down proof
    trap - EXIT
    # shellcheck disable=SC2009 # pgrep shows no arguments
    left=$(ps -o args= -u "$user" | grep -F tritonserver || true
        find /dev/shm "$sid/tmp" -maxdepth 1 -user "$user" -name "conch*")
    [ -z "$left" ] || fail "this was left behind: $left"
}

"$python" - <<'PY' || fail "something listens on port 8001, which the README's command uses"
import socket

with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("0.0.0.0", 8001))
PY
make_sid
python_parts >"$work/python"
mkdir -p "$work/home" && chown "$user" "$work/home"
image=$work/home/tritonserver-cpu.sif
if [ ! -e "$image" ]; then
    say "building $image as user $user (log $work/build.log)"
    (in_sid bash "$root/singularity/build.sh" tritonserver-cpu "$image" ${build_options[@]+"${build_options[@]}"}) >"$work/build.log" 2>&1 ||
        { tail -n 20 "$work/build.log" >&2 && fail "the build failed"; }
fi
convert_model
ln -sfn "$image" "$work/home/tritonserver-pyt.sif"
ln -sfn "$store" "$work/home/model_store"
serve_and_score bash -c 'SINGULARITYENV_CUDA_VISIBLE_DEVICES=7 exec singularity run --nv --bind model_store:/model_store \
    tritonserver-pyt.sif tritonserver --model-repository=/model_store'
serve_and_score bash "$root/singularity/serve.sh" --cpu --image "$image" --store "$store" tiny
supervise
say "proved: $(basename "$image") built without root and served what Conch's client scored right"
