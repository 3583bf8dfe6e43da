"""
Everything that touches Redis. Nothing outside this package imports `redis`.

`transitions` is the only writer and `queries` the only reader; both describe calls, `connection` sends them.
"""
