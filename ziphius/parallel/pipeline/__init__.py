"""Pipeline parallelism: a schedule is a table, which is checked, timed, drawn and executed."""
