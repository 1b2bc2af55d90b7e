#!/bin/sh
# Makes sites/NAME beside this file: site.toml, policy.toml, keys, and a copy of the site's records.
#   sudo FEDGE_BASE_MODEL=DIRECTORY sh new_site.sh NAME RECORDS.jsonl [words of client init]
# As root, for the node key becomes the node's, identity and records the trainer's. Once the images are built.
# All of it is there afterwards or nothing, so that it can be typed again after an error.
set -eu
umask 022
refuse() {
  echo "error: $1" >&2
  exit 2
}
[ $# -ge 2 ] || refuse "expected NAME RECORDS.jsonl: sudo FEDGE_BASE_MODEL=DIRECTORY sh new_site.sh clinic clinic.jsonl"
case $1 in "" | [!a-z0-9]* | *[!a-z0-9_-]*)
  refuse "the site's name is '$1': expected small letters, digits, - and _, as in compose.yaml" ;;
esac
[ "$(id -u)" = 0 ] || refuse "this is not root, who alone can give each key to its user: sudo --preserve-env=FEDGE_BASE_MODEL sh new_site.sh …"
[ -f "$2" ] || refuse "$2 does not exist or is not a file: pass the site's records, one JSON object a line"
[ -n "${FEDGE_BASE_MODEL:-}" ] || refuse "FEDGE_BASE_MODEL is not set: export it as the directory of the base model"
[ -d "$FEDGE_BASE_MODEL" ] || refuse "FEDGE_BASE_MODEL is $FEDGE_BASE_MODEL, which is no directory: name the base model's"
# What was said is relative to where it was said.
name=$1 records=$(realpath "$2") model=$(realpath "$FEDGE_BASE_MODEL")
shift 2
cd "$(dirname "$0")"
[ -f coordinator/ca.crt ] || refuse "coordinator/ca.crt is missing: run certificates.sh first, or put the coordinator's ca.crt there"
mkdir -p sites
[ ! -e "sites/$name" ] || refuse "sites/$name exists already, and nothing is overwritten: move it away, or choose another name"
made=$(mktemp -d "$PWD/sites/.$name.XXXXXX")
trap 'rm -rf "$made"' EXIT
trap 'exit 1' HUP INT TERM
chmod 755 "$made"
install -m 644 coordinator/ca.crt "$made/ca.crt"
docker run --rm --network none --user 0:0 --cap-drop ALL \
  -v "$made:/etc/fedge" -v "$model:/srv/base-model:ro" fedge-site \
  client init /etc/fedge --docker --name "$name" --superlink proxy:8443 \
  --root-certificate /etc/fedge/ca.crt --base-model /srv/base-model --data /srv/records.jsonl "$@"
chown 10002:10002 "$made/node"
chown 10001:10001 "$made/identity"
install -m 600 -o 10001 -g 10001 "$records" "$made/records.jsonl"
mv -T "$made" "sites/$name"
