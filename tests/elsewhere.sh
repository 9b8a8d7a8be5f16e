#!/usr/bin/env bash
# Runs the tests as on a machine that is nobody's: in a clone, as another user, behind a dead proxy and more.
#
#   sudo tests/elsewhere.sh [PYTEST ARGUMENT]...     without arguments, all that `make test` runs
#
# The clone holds HEAD and what is changed in tracked files. Its interpreter is the checkout's .venv. The exit code is
# pytest's; 2 with a message where this machine cannot do it. Nothing stays behind: everything happens below one
# temporary folder, in namespaces of its own (mounts, network, processes), and the user exists nowhere else.
#
# ASPECTS names what is to be foreign, all by default; with fewer, one finds which of them breaks a test:
#
#   ASPECTS="umask locale" tests/elsewhere.sh tests/unit
#
#   folder     the clone and TMPDIR have a space in their names
#   user       an unprivileged user with no group but its own
#   home       HOME cannot be written, and belongs to root
#   cache      HOME has a .cache/huggingface, which cannot be written either
#   locale     LOCALE, de_DE.UTF-8 by default
#   timezone   TIMEZONE, Asia/Kolkata by default
#   umask      077
#   shm        64 MB of shared memory in /dev/shm
#   ipv6       no IPv6, not even ::1
#   ports      8000, 8001 and 8002, tritonserver's own, are taken
#   proxy      http_proxy and its kin name a proxy that is not there
#
# The variables of the caller are not passed on, and the network ends at the loopback device, whatever ASPECTS says.
set -euo pipefail

ALL="folder user home cache locale timezone umask shm ipv6 ports proxy"
ASPECTS=${ASPECTS-$ALL}
LOCALE=${LOCALE:-de_DE.UTF-8}
TIMEZONE=${TIMEZONE:-Asia/Kolkata}
DEAD_PROXY=http://127.0.0.1:9
MARKERS="not slow and not gpu and not int8 and not vllm"

refuse() {
	echo "elsewhere: $*" >&2
	exit 2
}

wants() {
	[[ " $ASPECTS " == *" $1 "* ]]
}

# What can be known to fail is found here, before anything is made.
check() {
	local aspect tool
	for aspect in $ASPECTS; do
		[[ " $ALL " == *" $aspect "* ]] || refuse "there is no aspect '$aspect'; there are: $ALL"
	done
	[ "$(uname)" = Linux ] || refuse "needs Linux, whose namespaces it uses"
	[ "$(id -u)" = 0 ] || refuse "needs root, to mount, to change the user and to take its own network; run it with sudo"
	for tool in git ip mount setpriv unshare; do
		command -v "$tool" >/dev/null || refuse "the program '$tool' is missing (packages git, iproute2, util-linux)"
	done
	unshare --mount --net --pid --fork true 2>/dev/null ||
		refuse "this machine lets nobody unshare its mounts and network (a container? it needs CAP_SYS_ADMIN)"
	[ -x "$ROOT/.venv/bin/python" ] || refuse "$ROOT/.venv is missing; make it with: make install"
	if wants locale && ! has_locale && [ ! -e "/usr/share/i18n/locales/${LOCALE%%.*}" ]; then
		refuse "the locale $LOCALE is not there and cannot be made (package locales); name another in LOCALE"
	fi
	if wants timezone && [ ! -e "/usr/share/zoneinfo/$TIMEZONE" ]; then
		refuse "the time zone $TIMEZONE is not there (package tzdata); name another in TIMEZONE"
	fi
}

# `locale -a` writes utf8 for UTF-8.
has_locale() {
	locale -a 2>/dev/null | tr -d - | grep -qixF "${LOCALE//-/}"
}

outside() {
	ROOT=$(cd "$(dirname "$0")/.." && pwd)
	check
	WORK=$(mktemp -d "${TMPDIR:-/tmp}/elsewhere.XXXXXX")
	chmod 755 "$WORK"
	export ROOT WORK ASPECTS LOCALE TIMEZONE
	# In the background, since bash heeds no signal while it runs something before it. The first process of a process
	# namespace takes all others with it.
	unshare --mount --net --pid --fork --kill-child --mount-proc \
		"$BASH" "$ROOT/tests/elsewhere.sh" --inside "$@" <&0 &
	NAMESPACE=$!
	trap 'kill -KILL "$NAMESPACE" 2>/dev/null || true; wait; rm -rf "$WORK"' EXIT
	trap 'exit 143' TERM HUP
	trap : INT # of a terminal, which pytest gets as well, and ends by
	until wait "$NAMESPACE"; do
		CODE=$?
		kill -0 "$NAMESPACE" 2>/dev/null || exit "$CODE"
	done
}

# An unused number, and the account of it in a private copy of the list of users.
make_user() {
	ID=$((60000 + RANDOM % 5000))
	while getent passwd "$ID" >/dev/null || getent group "$ID" >/dev/null; do
		ID=$((ID + 1))
	done
	cp /etc/passwd /etc/group "$WORK"
	echo "elsewhere:x:$ID:$ID::$WORK/home:/bin/bash" >>"$WORK/passwd"
	echo "elsewhere:x:$ID:" >>"$WORK/group"
	mount --bind "$WORK/passwd" /etc/passwd
	mount --bind "$WORK/group" /etc/group
	AS=(setpriv "--reuid=$ID" "--regid=$ID" --clear-groups --bounding-set=-all)
}

# Lets the user reach the interpreter where it lies in somebody's closed home, of which nothing else is to be seen.
open_way() {
	local folder at closed number=0
	for folder in "$@"; do
		mkdir "$WORK/way-$((++number))"
		mount --bind "$folder" "$WORK/way-$number"
	done
	number=0
	for folder in "$@"; do
		number=$((number + 1)) closed="" at=$folder
		while [ "$at" != / ]; do
			at=$(dirname "$at")
			if (($(stat -c '0%a' "$at") % 2 == 0)); then
				closed=$at
			fi
		done
		if [ -n "$closed" ]; then
			mount -t tmpfs -o mode=755 tmpfs "$closed"
		fi
		if [ ! -e "$folder" ]; then
			mkdir -p "$folder"
			mount --bind "$WORK/way-$number" "$folder"
		fi
	done
}

make_folders() {
	CLONE=$WORK/checkout TEMPORARY=$WORK/tmp
	if wants folder; then
		CLONE="$WORK/some checkout" TEMPORARY="$WORK/some files"
	fi
	git -c advice.detachedHead=false clone --quiet --no-hardlinks "$ROOT" "$CLONE"
	git -C "$ROOT" diff --binary HEAD | git -C "$CLONE" apply --allow-empty
	mkdir "$WORK/home" "$TEMPORARY"
	if wants cache; then
		mkdir -p "$WORK/home/.cache/huggingface"
	fi
	if wants user; then
		chown -R "$ID:$ID" "$CLONE" "$TEMPORARY"
	fi
	if ! wants home; then
		chown -R "$ID:$ID" "$WORK/home"
	elif wants user; then
		chmod 555 "$WORK/home"
	else # root writes in spite of any mode
		mount --bind -o ro "$WORK/home" "$WORK/home"
	fi
}

make_environment() {
	local name
	name=$(id -nu "$ID")
	ENVIRONMENT=("PATH=$ROOT/.venv/bin:/usr/local/bin:/usr/bin:/bin" "HOME=$WORK/home" "USER=$name" "LOGNAME=$name"
		SHELL=/bin/bash "TMPDIR=$TEMPORARY" "TERM=${TERM:-dumb}" LANG=C.UTF-8
		# The .venv would import the checkout that it was made in.
		"PYTHONPATH=$CLONE")
	if wants locale; then
		ENVIRONMENT+=("LANG=$LOCALE" "LC_ALL=$LOCALE")
		if ! has_locale; then
			mkdir "$WORK/locales"
			localedef -i "${LOCALE%%.*}" -f "${LOCALE#*.}" "$WORK/locales/$LOCALE"
			ENVIRONMENT+=("LOCPATH=$WORK/locales")
		fi
	fi
	if wants timezone; then
		ENVIRONMENT+=("TZ=$TIMEZONE")
	fi
	if wants proxy; then
		for name in http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY; do
			ENVIRONMENT+=("$name=$DEAD_PROXY")
		done
	fi
}

# Ends once all three listen; the namespace's end ends the listener.
take_ports() {
	coproc "$ROOT/.venv/bin/python" -c '
import socket, time
listeners = [socket.create_server(("", port)) for port in (8000, 8001, 8002)]
print("listening", flush=True)
time.sleep(1e6)'
	local line
	read -r line <&"${COPROC[0]}"
	[ "$line" = listening ]
}

inside() {
	local prefix
	prefix=$("$ROOT/.venv/bin/python" -c 'import sys; print(sys.base_prefix)')
	ID=0 AS=()
	if wants user; then
		make_user
	fi
	make_folders
	make_environment
	ip link set lo up
	if wants ipv6 && [ -e /proc/sys/net/ipv6 ]; then
		echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6
		echo 1 >/proc/sys/net/ipv6/conf/lo/disable_ipv6
	fi
	if wants shm; then
		mount -t tmpfs -o size=64m,mode=1777 tmpfs /dev/shm
	fi
	if wants ports; then
		take_ports
	fi
	if wants user; then
		open_way "$(readlink -f "$ROOT/.venv")" "$prefix"
	fi
	if wants umask; then
		umask 077
	else
		umask 022
	fi
	cd "$CLONE"
	echo "elsewhere: $ASPECTS"
	# No exec: the first process must stay, to gather the orphans.
	"${AS[@]}" env --ignore-environment "${ENVIRONMENT[@]}" "$ROOT/.venv/bin/python" -m pytest "$@"
}

if [ "${1-}" = --inside ]; then
	shift
	inside "$@"
else
	if [ $# = 0 ]; then
		set -- --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "$MARKERS"
	fi
	outside "$@"
fi
