# shellcheck shell=bash disable=SC2034  # read by launch/tpu.sh
# What launch/tpu.sh needs to know. Every value can also come from the environment.
PROJECT=${PROJECT:-}                       # Google Cloud project
ZONE=${ZONE:-us-central1-a}
NAME=${NAME:-disco}                        # of the slice
ACCELERATOR=${ACCELERATOR:-v5litepod-16}   # v4-32, v5litepod-16, v5p-16, v6e-16, ...
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}    # image of the machines
PROVISION=${PROVISION:-spot}               # on-demand | spot | queued | queued-spot
WORKDIR=${WORKDIR:-}                       # gs://BUCKET/RUN: outlives the slice
TASK=${TASK:-pretrain}
POLL_S=${POLL_S:-60}                       # babysit looks so often
MAX_RESTARTS=${MAX_RESTARTS:-100}
MAX_QUICK=${MAX_QUICK:-5}                  # so many runs in a row may fail ...
QUICK_S=${QUICK_S:-600}                    # ... within so many seconds of their start
MAX_UNREACHABLE=${MAX_UNREACHABLE:-30}     # looks in a row that a machine may not answer
KEEP=${KEEP:-}                             # 1: babysit leaves the slice that it made
