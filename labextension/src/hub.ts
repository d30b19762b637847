/** The front end's end of one kernel: states and events go to their views, commands to the kernel. */

import { pageLanguage, translator } from './i18n'
import { makeHost, Mounts } from './mount'
import type { Shown } from './view'
import { showState } from './views'
import type { Command, Event, ProgressEvent, State } from './wire'

/** One screen: its view, and what came while the page did not show it. */
interface Screen {
  type: State['type']
  /** Nothing until the page has a place for it. */
  shown: Shown<State> | null
  state: State | null
  progress: ProgressEvent | null
  /** The kernel is gone. */
  isLost: boolean
  /** Messages may have been lost. */
  isStale: boolean
  /** Says hello again. */
  timer: ReturnType<typeof setTimeout> | undefined
}

/**
 * When a view that can stop something says hello again, as long as nobody has heard it while at work. What is
 * said before the front end has a subshell for our messages is heard only when the cell is over.
 */
const AGAIN_MS = [250, 750, 2000, 5000, 10_000]

/** What is of use only to who sees it; the newest progress is kept. */
const PASSING: Event['type'][] = ['answer', 'progress', 'sweep']

export class Hub {
  private readonly screens = new Map<string, Screen>()
  private readonly asked = new Set<string>()
  /** Views that threw: their static HTML stays. */
  private readonly failed = new Set<string>()
  private readonly mounts: Mounts
  private isGone = false

  /** `key` is what the places of this kernel's views begin with. */
  constructor(
    key: string,
    private readonly send: (command: Command) => void,
  ) {
    this.mounts = new Mounts(key, { found: view => this.find(view), covered: view => this.cover(view) })
  }

  /** Tell the kernel that somebody is here. */
  greet(): void {
    this.send({ type: 'hello' })
  }

  /** Take what the kernel sent. */
  receive(event: Event): void {
    if (event.type === 'closed') {
      this.failed.delete(event.view)
      this.close(event.view)
    } else if (!this.failed.has(event.view)) this.attempt(event.view, () => this.take(event))
  }

  /** The kernel is gone: every view says so, and stands as long as its place does. */
  lose(): void {
    if (this.isGone) return
    this.isGone = true
    const message = translator(pageLanguage())('lostKernel')
    for (const [view, screen] of [...this.screens]) {
      const { shown, isLost } = screen
      screen.isLost = true
      clearTimeout(screen.timer)
      if (!shown) this.close(view)
      else if (!isLost) this.attempt(view, () => shown.lost(message))
    }
    this.mounts.retire(() => this.dispose())
  }

  /** The kernel is heard again after a while: what it said meanwhile is asked for. */
  reconnect(): void {
    if (this.isGone) return
    this.asked.clear()
    for (const [view, screen] of this.screens) {
      if (!screen.shown || screen.isLost) continue
      screen.isStale = true
      if (this.mounts.isShown(view)) this.catchUp(view, screen, screen.shown)
    }
    this.mounts.settle()
  }

  /** Forget everything; the static HTML is seen again. */
  dispose(): void {
    for (const view of [...this.screens.keys()]) this.close(view)
    this.mounts.dispose()
  }

  private take(event: Exclude<Event, { type: 'closed' }>): void {
    if (event.type === 'state') {
      this.isGone = false // whoever sends a state is there
      this.show(event.view, event.state)
      return
    }
    const screen = this.screens.get(event.view)
    if (!screen?.shown || screen.isLost) return
    if (event.type === 'hello') clearTimeout(screen.timer)
    // An answer is made of its events; other views can do without those that nobody sees.
    if (!this.isFed(event.view, screen) && PASSING.includes(event.type)) {
      if (event.type === 'progress') screen.progress = event
      return
    }
    this.catchUp(event.view, screen, screen.shown)
    screen.shown.event(event)
  }

  private show(view: string, state: State): void {
    let screen = this.screens.get(view)
    if (screen?.type !== state.type || screen.isLost) {
      this.close(view)
      screen = {
        type: state.type, shown: null, state: null, progress: null, isLost: false, isStale: false, timer: undefined,
      }
      this.screens.set(view, screen)
    }
    screen.state = state
    screen.progress = null
    if (!screen.shown) {
      if (state.type === 'answer' || this.mounts.hasPlace(view)) this.open(view, screen)
    } else if (this.isFed(view, screen)) this.catchUp(view, screen, screen.shown)
  }

  /** Make the view of a screen. */
  private open(view: string, screen: Screen): void {
    const { state } = screen
    if (!state) return
    const language = pageLanguage()
    const { host, root } = makeHost()
    root.lang = language
    const shown = showState(state, { root, view, language, t: translator(language), send: this.send })
    if (!shown) {
      this.failed.add(view)
      this.screens.delete(view)
      return
    }
    screen.shown = shown
    screen.state = null
    this.mounts.add(view, host)
    // Whoever hears this while it is at work will hear Stop as well.
    this.send({ type: 'hello', view })
    if (screen.type === 'job' || screen.type === 'answer') this.greetAgain(view, screen, 0)
  }

  private greetAgain(view: string, screen: Screen, times: number): void {
    screen.timer = setTimeout(() => {
      this.send({ type: 'hello', view })
      this.greetAgain(view, screen, times + 1)
    }, AGAIN_MS[times] ?? AGAIN_MS[AGAIN_MS.length - 1])
  }

  /** A place without a view: one that waits for it, or the page was loaded again and the kernel may know it. */
  private find(view: string): void {
    const screen = this.screens.get(view)
    if (screen) {
      if (!screen.shown) this.attempt(view, () => this.open(view, screen))
    } else if (!this.asked.has(view) && !this.failed.has(view) && !this.isGone) {
      this.asked.add(view)
      this.send({ type: 'hello', view })
    }
  }

  /** A view is in the page, perhaps after a while. */
  private cover(view: string): void {
    const screen = this.screens.get(view)
    const shown = screen?.shown
    if (shown && !screen.isLost) this.attempt(view, () => this.catchUp(view, screen, shown))
  }

  private isFed(view: string, screen: Screen): boolean {
    return screen.type === 'answer' || this.mounts.isShown(view)
  }

  /** Give a view what came while nobody saw it. */
  private catchUp(view: string, screen: Screen, shown: Shown<State>): void {
    const { state, progress, isStale } = screen
    screen.state = screen.progress = null
    screen.isStale = false
    if (state) shown.update(state)
    if (progress) shown.event(progress)
    if (isStale) this.send({ type: 'hello', view })
  }

  /** Do something with a view; one that fails makes way for what the notebook holds. */
  private attempt(view: string, act: () => void): void {
    try {
      act()
    } catch (error) {
      console.warn('llm_magic: a view failed; the notebook shows its static form', error)
      this.failed.add(view)
      this.close(view)
    }
  }

  private close(view: string): void {
    const screen = this.screens.get(view)
    this.screens.delete(view)
    clearTimeout(screen?.timer)
    this.mounts.remove(view)
    try {
      screen?.shown?.cleanup()
    } catch (error) {
      console.warn('llm_magic: a view did not end well', error)
    }
  }
}
