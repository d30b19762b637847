/** Seconds that go on between two events. */

const TICK_MS = 200

export class Clock {
  private readonly timer: ReturnType<typeof setInterval>
  private knownS = 0
  private since = performance.now()

  /** `tick` is called a few times a second with the seconds since the start, while `element` is in the page. */
  constructor(
    element: Element,
    private readonly tick: (elapsedS: number) => void,
  ) {
    this.timer = setInterval(() => {
      if (element.isConnected) tick(this.knownS + this.sinceS)
    }, TICK_MS)
  }

  /** Seconds since the kernel last said what time it is. */
  get sinceS(): number {
    return (performance.now() - this.since) / 1e3
  }

  /** What the kernel says. */
  set(elapsedS: number): void {
    this.knownS = elapsedS
    this.since = performance.now()
    this.tick(elapsedS)
  }

  stop(): void {
    clearInterval(this.timer)
  }
}
