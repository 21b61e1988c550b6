# Sourced by the launchers: checks of what the user set.

die() {
  echo "error: $*" >&2
  exit 2
}

# check_number NAME VALUE LEAST [MOST]: ends the script unless VALUE is an integer in this range.
check_number() {
  local range="of $3 or more"
  [ -z "${4:-}" ] || range="from $3 to $4"
  [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] && [ "$2" -ge "$3" ] && [ "$2" -le "${4:-999999}" ] ||
    die "$1 must be a number $range, got '$2'"
}
