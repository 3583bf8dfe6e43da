-- insist: one command that must not be refused at maxmemory: heartbeats, and when to look at a group again.
-- KEYS: its key.
-- ARGV: the command, then its words after the key.
-- Reply: the command's. As repeatable as that.
-- A script is refused at its first write, if that write may allocate. PERSIST does not.
call('PERSIST', KEYS[1])
return call(ARGV[1], KEYS[1], unpack(ARGV, 2))
