#!/bin/sh
# Compiler launcher: keep_report.sh <compiler> ... -o <object> ...
# ptxas's report on registers and spills goes to <object>.ptxas.log, everything else to the terminal.
object=
previous=
for argument in "$@"; do
    if [ "$previous" = -o ]; then object=$argument; fi
    previous=$argument
done
if [ -z "$object" ]; then exec "$@"; fi
messages=$(mktemp)
"$@" 2>"$messages"
status=$?
report='^ptxas info|bytes stack frame|^ *[0-9]+ bytes cumulative'
grep -Ev "$report" "$messages" >&2
grep -E "$report" "$messages" >"$object.ptxas.log"
rm -f "$messages"
exit $status
