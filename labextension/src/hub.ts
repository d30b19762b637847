/** The front end's end of one kernel: states and events go to their views, commands to the kernel. */

import { pageLanguage, translator } from './i18n'
import { makeHost, Mounts } from './mount'
import type { Shown } from './view'
import { showState } from './views'
import type { Command, Event, State } from './wire'

/** One screen: a view that is shown, with the type of its state. */
interface Screen {
  type: State['type']
  shown: Shown<State>
}

export class Hub {
  private readonly screens = new Map<string, Screen>()
  private readonly asked = new Set<string>()
  private readonly mounts: Mounts
  private isLost = false

  /** `key` is what the places of this kernel's views begin with. */
  constructor(
    key: string,
    private readonly send: (command: Command) => void,
  ) {
    this.mounts = new Mounts(key, view => this.ask(view))
  }

  /** Tell the kernel that somebody is here. */
  greet(): void {
    this.send({ type: 'hello' })
  }

  /** Take what the kernel sent. */
  receive(event: Event): void {
    if (event.type === 'state') this.show(event.view, event.state)
    else if (event.type === 'closed') this.close(event.view)
    else this.screens.get(event.view)?.shown.event(event)
  }

  /** The kernel is gone: every view says so. */
  lose(): void {
    if (this.isLost) return
    this.isLost = true
    const message = translator(pageLanguage())('lostKernel')
    for (const { shown } of this.screens.values()) shown.lost(message)
  }

  /** Forget everything; the static HTML is seen again. */
  dispose(): void {
    for (const view of [...this.screens.keys()]) this.close(view)
    this.mounts.dispose()
  }

  private show(view: string, state: State): void {
    const screen = this.screens.get(view)
    if (screen?.type === state.type && !this.isLost) {
      screen.shown.update(state)
      return
    }
    this.isLost = false // a connection that came back: whoever sends a state is there
    screen?.shown.cleanup()
    this.mounts.remove(view)
    const language = pageLanguage()
    const { host, root } = makeHost()
    root.lang = language
    const shown = showState(state, { root, view, language, t: translator(language), send: this.send })
    if (!shown) {
      this.screens.delete(view)
      return
    }
    this.screens.set(view, { type: state.type, shown })
    this.mounts.add(view, host)
    // Whoever hears this while it is at work will hear Stop as well.
    this.send({ type: 'hello', view })
  }

  /** A place without a view: the page was loaded again, and the kernel may know it. */
  private ask(view: string): void {
    if (this.asked.has(view) || this.isLost) return
    this.asked.add(view)
    this.send({ type: 'hello', view })
  }

  private close(view: string): void {
    this.screens.get(view)?.shown.cleanup()
    this.screens.delete(view)
    this.mounts.remove(view)
  }
}
