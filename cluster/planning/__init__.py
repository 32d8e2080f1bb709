"""What a run will take on a cluster: the driver's own plan, carried out by a clock.

command.py    `shardprune plan`: all of it as text
layouts.py    layouts worth trying, and the best of them
forecast.py   seconds, bytes and money of a layout
traffic.py    bytes that are sent, read and written
portion.py    a layout, and what one worker holds of it
simulate.py   the driver's plan by the clock, with failures
attempt.py    one crew at work, until it is done or lost
schedule.py   layout, durations and who was busy when, as values
eventloop.py  processes that take time or wait for each other
draw.py       that as lines of letters and as a picture
"""
