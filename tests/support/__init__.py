"""What the tests are built with: recorded exchanges, a scripted engine, a raw HTTP client and a clock that tests move.

Nothing here models an engine. An answer is either a recording of a real one or bytes that a test wrote down.
"""
