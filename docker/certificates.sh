#!/bin/sh
# Makes the coordinator's CA, the certificates of SuperLink and proxy, and the secret that SuperLink
# and SuperExec share, in coordinator/ beside this file. As root, for the keys go to their users.
#   sudo sh certificates.sh [NAME …]      more names under which sites reach the proxy
# ca.key signs whoever may call himself the coordinator: move it to another machine afterwards.
# All of it is there afterwards or nothing, so that it can be typed again after an error.
set -eu
umask 077
refuse() {
  echo "error: $1" >&2
  exit 2
}
[ "$(id -u)" = 0 ] || refuse "this is not root, who alone can give each key to its user: sudo sh certificates.sh"
command -v openssl > /dev/null || refuse "openssl is not installed: apt-get install openssl"
cd "$(dirname "$0")"
[ ! -e coordinator ] || refuse "coordinator exists already, and nothing is overwritten: move it away"
made=$(mktemp -d "$PWD/.coordinator.XXXXXX")
trap 'rm -rf "$made"' EXIT
trap 'exit 1' HUP INT TERM
home=$PWD
cd "$made"
names="DNS:proxy,DNS:localhost,IP:127.0.0.1"
for name in "$@"; do names="$names,DNS:$name"; done

openssl ecparam -name prime256v1 -genkey -noout -out ca.key
openssl req -x509 -new -key ca.key -days 3650 -subj "/CN=Federation CA" \
  -addext keyUsage=critical,keyCertSign,cRLSign -out ca.crt

issue() { # NAME NAMES-THAT-IT-HAS
  printf "basicConstraints=critical,CA:FALSE\nextendedKeyUsage=serverAuth\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\nsubjectAltName=%s\n" "$2" > "$1.ext"
  openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout "$1.key" -subj "/CN=$1" -out "$1.csr"
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -out "$1.crt" -extfile "$1.ext"
  rm "$1.ext" "$1.csr"
}
issue superlink DNS:superlink,DNS:localhost,IP:127.0.0.1
issue proxy "$names"
openssl rand -out superexec.secret 32

chmod 755 .
chmod 644 ./*.crt
chown 10003:10003 superlink.key superexec.secret
chown 101:101 proxy.key
cd "$home"
mv -T "$made" coordinator
