/**
 * The module that anywidget loads.
 *
 * The hub of a kernel has no view of its own: `initialize` runs when its model is made, and puts live views
 * over the static HTML of the notebook's outputs. A widget of one view alone (`llm.view("map")`) goes
 * through `render`, in any host of the anywidget front-end module standard.
 */

import { Hub } from './hub'
import { pageLanguage, translator } from './i18n'
import { type Model, watchKernel } from './loss'
import { makeHost } from './mount'
import { showState } from './views'
import type { Command, Event, State } from './wire'

function initialize({ model }: { model: Model }): (() => void) | undefined {
  const key = String(model.get('key') ?? '')
  if (!key) return undefined
  const hub = new Hub(key, command => model.send(command))
  const receive = (content: unknown) => hub.receive(content as Event)
  model.on('msg:custom', receive)
  const unwatch = watchKernel(model, () => hub.lose(), () => hub.reconnect())
  hub.greet()
  return () => {
    model.off('msg:custom', receive)
    unwatch()
    hub.lose()
  }
}

function render({ model, el }: { model: Model; el: HTMLElement }): () => void {
  const view = String(model.get('view'))
  const language = pageLanguage()
  const t = translator(language)
  const { host, root } = makeHost()
  root.lang = language
  el.append(host)
  const send = (command: Command) => model.send(command)
  const shown = showState(model.get('state') as State, { root, view, language, t, send })
  const receive = (content: unknown) => {
    const event = content as Event
    if (event.type === 'state') shown?.update(event.state)
    else shown?.event(event)
  }
  model.on('msg:custom', receive)
  const greet = () => send({ type: 'hello', view })
  const unwatch = watchKernel(model, () => shown?.lost(t('lostKernel')), greet)
  greet()
  return () => {
    model.off('msg:custom', receive)
    unwatch()
    shown?.cleanup()
  }
}

export default { initialize, render }
