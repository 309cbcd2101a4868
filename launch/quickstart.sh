#!/usr/bin/env bash
# From a clean clone to a distilled student: creates a virtual environment, installs the package
# and runs the demo on handwritten digits. Takes less than 8 minutes on 2 CPU cores after the
# installation. Arguments are passed to `disco-jax demo`, e.g. --config.seeds="(0,1,2)".
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=launch/venv.sh
source launch/venv.sh
use_venv demo
exec "$PYTHON" -m disco_jax demo --workdir runs/quickstart "$@"
