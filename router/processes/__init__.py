"""The running service: one process or several behind one port. In dependency order:

``place``       what a process is told by the one that started it
``merge``       what several say, as one (pure)
``siblings``    asking and telling the others
``draining``    ending well
``serving``     one process: socket, event loop, application
``supervisor``  several: started, watched, replaced, ended
"""
