#!/bin/bash
# Names the tests that failed, with what each one said first: the log of a whole run is long. Takes the log's file.
grep -q '^test .* FAILED$' "$1" || exit 0
echo 'failed:'
awk '
  /^---- .* stdout ----$/ { name = $2; left = 0 }
  / panicked at / && name != "" { print "  " name; left = 12; name = "" }
  left > 0 { if (/^stack backtrace:/) left = 0; else { print "    " $0; left-- } }
' "$1"
