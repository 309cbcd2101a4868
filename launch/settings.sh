# shellcheck shell=bash disable=SC2034  # read by launch/tpu.sh
# Settings of launch/tpu.sh. Environment variables override them.
PROJECT=${PROJECT:-}                       # Google Cloud project
ZONE=${ZONE:-us-central1-a}
NAME=${NAME:-disco}                        # name of the slice
ACCELERATOR=${ACCELERATOR:-v5litepod-16}   # v4-32, v5litepod-16, v5p-16, v6e-16, ...
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}    # software version of the machines
PROVISION=${PROVISION:-spot}               # on-demand | spot | queued | queued-spot
WORKDIR=${WORKDIR:-}                       # gs://BUCKET/RUN, which outlives the slice
TASK=${TASK:-pretrain}
POLL_S=${POLL_S:-60}                       # seconds between babysit's checks
MAX_RESTARTS=${MAX_RESTARTS:-100}
MAX_QUICK=${MAX_QUICK:-5}                  # babysit gives up after this many consecutive runs ...
QUICK_S=${QUICK_S:-600}                    # ... that failed within this many seconds of their start
MAX_UNREACHABLE=${MAX_UNREACHABLE:-30}     # consecutive checks without an answer from a machine
KEEP=${KEEP:-}                             # 1: babysit does not delete the slice it created
