/** Whether the model is at work now, as far as events tell: on until they stay away. */

const REST_MS = 2000
const AT_MOST_MS = 60_000

export interface Flow {
  /** Something is on its way now. */
  readonly isOn: boolean
  /** There are times of a sweep. */
  readonly isLive: boolean
  /** A sweep that took so long is over; the next may take as long. */
  sweep: (seconds: number) => void
  clear: () => void
  cleanup: () => void
}

/** `rested` is called when nothing came for a while. */
export function makeFlow(rested: () => void): Flow {
  let timer: ReturnType<typeof setTimeout> | undefined
  let isLive = false
  const stop = () => {
    clearTimeout(timer)
    timer = undefined
  }
  const keepOn = (ms: number) => {
    stop()
    timer = setTimeout(() => {
      stop()
      rested()
    }, ms)
  }
  return {
    get isOn() {
      return timer !== undefined
    },
    get isLive() {
      return isLive
    },
    sweep(seconds) {
      isLive = true
      keepOn(Math.min(AT_MOST_MS, REST_MS + 2000 * seconds))
    },
    clear() {
      stop()
      isLive = false
    },
    cleanup: stop,
  }
}
