-- insist: one command that must not be refused at maxmemory: heartbeats, and the time of the next
-- look at a group.
-- KEYS: its key.
-- ARGV: the command, then its words after the key.
-- Reply: the command's. As repeatable as the command is.
-- Redis refuses a script at its first write, if that write may allocate. PERSIST does not.
redis.call('PERSIST', KEYS[1])
return redis.call(ARGV[1], KEYS[1], unpack(ARGV, 2))
