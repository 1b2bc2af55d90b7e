# Fills the words of examples/deployment/nginx.conf for the proxy's container.
s|@home@/nginx/|/tmp/|
s|@home@|/tmp|
s|@logs@/nginx-access.log|/dev/stdout|
s|@superlink@|superlink:8000|
s|@listen@|8443|
s|@certificates@|/etc/fedge|
