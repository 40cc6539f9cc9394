#!/usr/bin/env bash
# bash deploy/restartable.sh COMMAND...    runs COMMAND; where it ends well after a SIGTERM, this ends with status 143
#
# The trainer answers SIGTERM with a checkpoint and status 0, which a scheduler takes for a finished run and does not
# start again. Every other status is COMMAND's own. Linux keeps signals without a handler from the first process of a
# container; behind this one the trainer is not the first, so that SIGTERM ends it before its loop, too.
set -u
child='' terminated='' again=1
trap 'terminated=1 again=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM
"$@" &
child=$!
[[ -z $terminated ]] || kill -TERM "$child" # the signal came before the line above
while [[ $again ]]; do                      # a signal ends `wait` before its process ends
  again=''
  wait "$child"
  status=$?
done
if [[ $terminated && $status == 0 ]]; then status=143; fi
exit "$status"
