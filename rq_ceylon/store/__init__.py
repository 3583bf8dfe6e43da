"""
The only package that talks to Redis. Nothing outside it imports `redis`.

`transitions` describes every write and `queries` makes every read; `connection` sends the calls.
"""
