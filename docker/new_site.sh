#!/bin/sh
# Makes sites/NAME beside this file: site.toml, policy.toml, node key, and the site's records.
#   sudo FEDGE_BASE_MODEL=DIRECTORY sh new_site.sh NAME RECORDS.jsonl [words of client init]
# As root, for the key becomes the node's and the records the trainer's. Once the images are built.
set -eu
cd "$(dirname "$0")"
name=$1 records=$2
shift 2
mkdir -p sites
mkdir "sites/$name" # ends here if there is one: nothing is overwritten
install -m 644 coordinator/ca.crt "sites/$name/ca.crt"
docker run --rm --network none --user 0:0 --cap-drop ALL \
  -v "$PWD/sites/$name:/etc/fedge" -v "$FEDGE_BASE_MODEL:/srv/base-model:ro" fedge-site \
  client init /etc/fedge --docker --name "$name" --superlink proxy:8443 \
  --root-certificate /etc/fedge/ca.crt --base-model /srv/base-model --data /srv/records.jsonl "$@"
chown 10002:10002 "sites/$name/node"
install -m 600 -o 10001 -g 10001 "$records" "sites/$name/records.jsonl"
