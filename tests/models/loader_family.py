"""A rank with torch's loader and a worker process: FOLDER. Says so, then waits for its end."""

import sys
import time

from models.data import LoaderOptions, list_images, open_loader

if __name__ == "__main__":  # the worker processes import this file
    options = LoaderOptions(train=True, batch_size=5, image_size=8, resize=8, workers=1)
    loader = open_loader("torch", list_images(sys.argv[1]), options)
    next(iter(loader))
    print("ready", flush=True)
    time.sleep(600)  # the worker now waits in its queue
