#!/bin/bash
# Serves models of a store from an image, in the foreground. It needs Apptainer or Singularity, the image and the store,
# nothing else of Conch. `conch serve up` also watches the server.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: serve.sh [--gpu N | --cpu] [--image FILE] [--store FOLDER] [--port N]
                [--host ADDRESS (--secret-env NAME | --allow-anyone)] MODEL... [-- FLAG...]

MODEL    models of the store to serve
--gpu    GPU, or several as 6,7, by the numbers of nvidia-smi; default: 7, the last of eight
--cpu    no GPU, from the image of tritonserver-cpu.def
--image  image file or sandbox folder; default: tritonserver-pyt.sif, with --cpu tritonserver-cpu.sif
--store  default: model_store
--host   address to listen on; default: 127.0.0.1. Another needs --secret-env or --allow-anyone; to load models,
         which runs code of the store, takes a secret that is made anew at each start and told to nobody
--secret-env    environment variable with the secret that clients must send; whoever lists processes sees it
--allow-anyone  with --host: anybody who reaches it may score
--port   of gRPC; default: 8001
FLAG     further flags of tritonserver
TEXT
}

fail() {
    echo "error: $1" >&2
    exit 1
}

gpu=7 image="" store=model_store host=127.0.0.1 port=8001 secret_env="" anyone="" models=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --cpu) gpu="" ;;
        --allow-anyone) anyone=1 ;;
        --gpu | --image | --store | --host | --port | --secret-env)
            [ -n "${2:-}" ] || fail "$1 needs a value"
            name=${1#--}
            declare "${name//-/_}=$2" && shift
            ;;
        --) shift && break ;;
        -*) fail "unknown option $1; serve.sh --help lists them" ;;
        *) models+=("$1") ;;
    esac
    shift
done

if [ -n "$gpu" ]; then default_image=tritonserver-pyt.sif which=tritonserver; else default_image=tritonserver-cpu.sif which=tritonserver-cpu; fi
image=${image:-$default_image}
tool=$(command -v apptainer || command -v singularity) ||
    fail "neither apptainer nor singularity is installed (Debian sid, Fedora, EPEL: package apptainer)"
[ -e "$image" ] || fail "image $image does not exist; build it: singularity/build.sh $which $image"
[ -d "$store" ] || fail "model store $store is not a folder; conch convert makes one, --store names another"
there=$(cd "$store" && for config in */config.pbtxt; do [ -f "$config" ] && printf '%s ' "${config%/*}"; done)
[ ${#models[@]} -gt 0 ] || fail "name the models to serve; model store $store has: ${there:-none}"
for model in "${models[@]}"; do
    [[ $model =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ && -f $store/$model/config.pbtxt ]] ||
        fail "model '$model' is not in model store $store, which has: ${there:-none}"
done

# Either name of the prefix: Singularity knows one, and Apptainer prefers the other.
export SINGULARITYENV_CUDA_VISIBLE_DEVICES=$gpu APPTAINERENV_CUDA_VISIBLE_DEVICES=$gpu
run=(run --cleanenv --bind "$store:/model_store:ro")
[ -z "$gpu" ] || run+=(--nv)
server=(tritonserver --model-repository=/model_store --model-control-mode=explicit --disable-auto-complete-config
    --exit-timeout-secs=5 "--grpc-address=$host" "--grpc-port=$port" --allow-http=0 --allow-metrics=0
    "${models[@]/#/--load-model=}")
if [ -n "$secret_env" ]; then
    [[ ${!secret_env:-} =~ ^[A-Za-z0-9_-]+$ ]] ||
        fail "environment variable $secret_env must hold a secret of letters, digits, dash and underscore"
    server+=("--grpc-restricted-protocol=health,metadata,inference,model-config,statistics:conch=${!secret_env}")
fi
case $host in
    localhost) ;;
    *[!0-9.]* | [!1]* | 1[!2]* | 12[!7]* | 127[!.]*)
        [ -n "$secret_env$anyone" ] ||
            fail "host $host is reached from other machines, and whoever reaches it may have texts scored: give --secret-env or --allow-anyone"
        secret=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
        server+=("--grpc-restricted-protocol=model-repository,shared-memory,trace,logging:admin=$secret")
        ;;
esac
for model in "${models[@]}"; do
    echo "once it is ready: export TRITON_HOST=$host:$port/$model" >&2
done
exec "$tool" "${run[@]}" "$image" "${server[@]}" "$@"
