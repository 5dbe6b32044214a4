#!/usr/bin/env bash
# Draws top.svg: a daemon with the built-in bundle, five cameras under different shifts, `tta-edge top` for a while.
# Needs the port 5555 and half a minute: PATH=.venv/bin:$PATH docs/img/top.sh
set -euo pipefail
cd "$(dirname "$0")"
daemon=tcp://127.0.0.1:5555
folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; wait; rm -r "$folder"' EXIT

tta-edge serve --bind $daemon --http off --state-dir "$folder/state" --log-level error &
tta-edge status --to $daemon --timeout-s 30 > /dev/null
for camera in gate:fog:4 yard:contrast:5 dock:gaussian_noise:3 ramp:brightness:3 lift:defocus_blur:4; do
    tta-edge stream digits --stream "${camera%%:*}" --shift "${camera#*:}" --batch 32 --repeat --to $daemon --no-live &
done > /dev/null
# An operator switches one camera off and rolls another one back.
timeout --foreground --signal=INT 12 tta-edge top --to $daemon > /dev/null || true
tta-edge adapt off --stream lift --to $daemon > /dev/null
tta-edge rollback --stream dock --to $daemon > /dev/null
timeout --foreground --signal=INT 20 tta-edge top --to $daemon --svg top.svg > /dev/null || true
